"""One compression method a file; each exports METHOD. The file's name is the method's name."""
