"""New recipes for a folder of images, from the names of a teacher and a student."""
