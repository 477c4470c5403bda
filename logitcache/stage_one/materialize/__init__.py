"""Write the rendered views to files, for teachers of other frameworks and for services."""
