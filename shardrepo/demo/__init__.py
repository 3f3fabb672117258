"""The demo: the same load through a Repo and as one would write it by hand, on real servers, side by side."""
