"""Results for people: the demo, what a cache is and how accurate its teachers are, checks of recipes and caches."""
