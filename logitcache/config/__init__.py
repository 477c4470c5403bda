"""Recipes: YAML and overrides in, validated frozen objects out; and which files a user trusts."""
