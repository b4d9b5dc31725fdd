"""One number format a file; each exports FORMAT. The file's name is the format's name."""
