"""What an application needs to test against many real databases."""
