"""One command a file; each exports run, a typer command function. The file's name is the command's name."""
