"""Results for people: demo, summaries of caches and teachers, checks of recipes, reports on runs."""
