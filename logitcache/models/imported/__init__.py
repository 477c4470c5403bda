"""Teachers of other frameworks and services: their answers come from files, by the key of a view."""
