-- All that users have made in a database, but for Alembic's own table: its kind, its name, its definition.

WITH space AS (
    SELECT * FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
), extra AS (
    -- What belongs to an extension, and the functions and casts that a range comes with.
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e'
    OR (deptype = 'i' AND classid IN ('pg_proc'::regclass, 'pg_cast'::regclass))
), relation AS (
    SELECT c.*, format('%I.%I', nspname, relname) AS name FROM pg_class c JOIN space n ON n.oid = relnamespace
    WHERE (nspname, relname) <> (coalesce(CAST(:schema AS text), current_schema()), :table)
    AND NOT EXISTS (SELECT FROM extra WHERE classid = 'pg_class'::regclass AND objid = c.oid)
), tabular AS (
    SELECT * FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
), kind AS (
    SELECT t.*, format('%I.%I', nspname, typname) AS name FROM pg_type t JOIN space n ON n.oid = typnamespace
    WHERE NOT EXISTS (SELECT FROM extra WHERE classid = 'pg_type'::regclass AND objid = t.oid)
), routine AS (
    SELECT p.*, format('%I.%I(%s)', nspname, proname, pg_get_function_identity_arguments(p.oid)) AS name
    FROM pg_proc p JOIN space n ON n.oid = pronamespace
    WHERE NOT EXISTS (SELECT FROM extra WHERE classid = 'pg_proc'::regclass AND objid = p.oid)
), privilege AS (
    SELECT 'schema ' || quote_ident(nspname) AS name, coalesce(nspacl, acldefault('n', nspowner)) AS acl FROM space
    UNION ALL
    SELECT 'relation ' || name,
        coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))
    FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    UNION ALL
    SELECT format('column %s.%I', name, attname), attacl FROM tabular t JOIN pg_attribute ON attrelid = t.oid
    WHERE attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT 'function ' || name, coalesce(proacl, acldefault('f', proowner)) FROM routine
    UNION ALL
    SELECT 'type ' || name, coalesce(typacl, acldefault('T', typowner)) FROM kind WHERE typtype IN ('e', 'd', 'r')
    UNION ALL
    SELECT concat_ws(' ', 'new', defaclobjtype, 'of', defaclrole::regrole, 'in', defaclnamespace::regnamespace), defaclacl
    FROM pg_default_acl
)

SELECT 'schema', quote_ident(nspname), 'owned by ' || nspowner::regrole FROM space

UNION ALL
SELECT
    CASE relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table'
        WHEN 'c' THEN 'composite type' ELSE 'table' END,
    name,
    concat_ws(', ', 'owned by ' || relowner::regrole,
        CASE WHEN relpersistence = 'u' THEN 'unlogged' END,
        reloptions::text,
        'partitioned by ' || pg_get_partkeydef(t.oid),
        pg_get_expr(relpartbound, t.oid),
        (SELECT 'inherits ' || string_agg(inhparent::regclass::text, ', ' ORDER BY inhseqno)
            FROM pg_inherits WHERE inhrelid = t.oid),
        CASE WHEN relrowsecurity THEN 'row security' END,
        CASE WHEN relforcerowsecurity THEN 'forced row security' END,
        CASE WHEN relkind IN ('r', 'p') AND relreplident <> 'd' THEN concat('replica identity ', relreplident) END,
        (SELECT 'tablespace ' || spcname FROM pg_tablespace s WHERE s.oid = reltablespace),
        CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(t.oid) END)
FROM tabular t

UNION ALL
SELECT
    'column',
    format('%s.%I', name, attname),
    concat_ws(' ', format_type(atttypid, atttypmod),
        CASE WHEN attcollation <> typcollation THEN 'collate ' || attcollation::regcollation END,
        CASE WHEN attnotnull THEN 'not null' END,
        CASE attidentity WHEN 'a' THEN 'always identity' WHEN 'd' THEN 'by default identity' END,
        CASE attgenerated WHEN '' THEN 'default ' WHEN 'v' THEN 'generated ' ELSE 'stored ' END
            || pg_get_expr(adbin, adrelid),
        CASE WHEN attstorage <> typstorage THEN concat('storage ', attstorage) END,
        nullif(attcompression, ''),
        attoptions::text)
FROM tabular t JOIN pg_attribute ON attrelid = t.oid JOIN pg_type y ON y.oid = atttypid
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attnum > 0 AND NOT attisdropped

UNION ALL
-- But for NOT NULL, of which PostgreSQL 18 makes constraints with names: columns say whether they are.
SELECT 'constraint', conname || ' of ' || name, pg_get_constraintdef(c.oid)
FROM (SELECT oid, name FROM relation UNION ALL SELECT oid, name FROM kind) o
JOIN pg_constraint c ON o.oid IN (conrelid, contypid)
WHERE contype <> 'n'

UNION ALL
SELECT
    'index',
    i.name,
    concat_ws(', ', pg_get_indexdef(indexrelid), CASE WHEN NOT indisvalid THEN 'invalid' END,
        CASE WHEN indisclustered THEN 'clustered' END, CASE WHEN indisreplident THEN 'replica identity' END)
FROM pg_index JOIN relation i ON i.oid = indexrelid JOIN relation t ON t.oid = indrelid

UNION ALL
SELECT
    'sequence',
    name,
    concat_ws(' ', format_type(seqtypid, NULL), 'start', seqstart, 'increment', seqincrement, 'from', seqmin,
        'to', seqmax, 'cache', seqcache, CASE WHEN seqcycle THEN 'cycle' END,
        (SELECT format('owned by %s.%I', refobjid::regclass, attname)
            FROM pg_depend JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
            WHERE classid = 'pg_class'::regclass AND objid = r.oid AND deptype IN ('a', 'i')))
FROM relation r JOIN pg_sequence ON seqrelid = r.oid

UNION ALL
SELECT
    'enum',
    name,
    (SELECT string_agg(quote_literal(enumlabel), ', ' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = k.oid)
FROM kind k WHERE typtype = 'e'

UNION ALL
SELECT
    'domain',
    name,
    concat_ws(' ', format_type(typbasetype, typtypmod), CASE WHEN typnotnull THEN 'not null' END,
        'default ' || typdefault, 'collate ' || nullif(typcollation, 0)::regcollation)
FROM kind WHERE typtype = 'd'

UNION ALL
SELECT 'range', name, format_type(rngsubtype, NULL) FROM kind k JOIN pg_range ON rngtypid = k.oid

UNION ALL
SELECT
    CASE prokind WHEN 'p' THEN 'procedure' WHEN 'a' THEN 'aggregate' ELSE 'function' END,
    name,
    'owned by ' || proowner::regrole || ', ' || CASE WHEN prokind <> 'a' THEN pg_get_functiondef(r.oid) ELSE
        (SELECT concat_ws(' ', aggtransfn, aggfinalfn, format_type(aggtranstype, NULL), agginitval)
            FROM pg_aggregate WHERE aggfnoid = r.oid) END
FROM routine r

UNION ALL
SELECT
    'trigger',
    tgname || ' of ' || name,
    pg_get_triggerdef(t.oid) || CASE tgenabled WHEN 'O' THEN '' ELSE concat(', enabled ', tgenabled) END
FROM relation r JOIN pg_trigger t ON tgrelid = r.oid WHERE NOT tgisinternal

UNION ALL
SELECT 'rule', rulename || ' of ' || name, pg_get_ruledef(w.oid)
FROM relation r JOIN pg_rewrite w ON ev_class = r.oid WHERE rulename <> '_RETURN'

UNION ALL
SELECT
    'policy',
    polname || ' of ' || name,
    concat_ws(' ', CASE WHEN polpermissive THEN 'permissive' ELSE 'restrictive' END, polcmd, 'for',
        (SELECT string_agg(CASE role WHEN 0 THEN 'public' ELSE role::regrole::text END, ', ' ORDER BY role)
            FROM unnest(polroles) role),
        'using ' || pg_get_expr(polqual, polrelid), 'with check ' || pg_get_expr(polwithcheck, polrelid))
FROM relation r JOIN pg_policy ON polrelid = r.oid

UNION ALL
SELECT 'extension', quote_ident(extname), extversion || ' in ' || extnamespace::regnamespace FROM pg_extension

UNION ALL
SELECT 'statistics', stxname || ' of ' || name, pg_get_statisticsobjdef(s.oid)
FROM pg_statistic_ext s JOIN relation r ON r.oid = stxrelid

UNION ALL
SELECT 'comment', concat_ws(' ', 'on', type, identity), description
FROM pg_description, pg_identify_object(classoid, objoid, objsubid)
WHERE objoid >= :first AND NOT EXISTS (SELECT FROM extra WHERE classid = classoid AND objid = objoid)

UNION ALL
SELECT
    'privileges',
    'on ' || name,
    string_agg(concat(CASE grantee WHEN 0 THEN 'public' ELSE grantee::regrole::text END, ': ', privilege_type,
        CASE WHEN is_grantable THEN ' with grant option' END), ', ' ORDER BY grantee, privilege_type)
FROM privilege, aclexplode(acl) GROUP BY name

UNION ALL
SELECT 'setting', concat_ws(' ', name, 'of ' || nullif(setrole, 0)::regrole), setting
FROM pg_db_role_setting, unnest(setconfig) pair, split_part(pair, '=', 1) name, substr(pair, length(name) + 2) setting
WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())

UNION ALL
-- Anything else: that it is there.
SELECT DISTINCT type, identity, ''
FROM pg_depend d, pg_identify_object(classid, objid, 0)
WHERE objid >= :first
AND NOT EXISTS (SELECT FROM extra e WHERE e.classid = d.classid AND e.objid = d.objid)
AND classid::regclass::text NOT IN (
    'pg_class', 'pg_type', 'pg_attrdef', 'pg_constraint', 'pg_rewrite', 'pg_trigger', 'pg_proc', 'pg_policy',
    'pg_namespace', 'pg_extension', 'pg_statistic_ext', 'pg_default_acl', 'pg_amop', 'pg_amproc')
