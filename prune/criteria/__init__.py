"""One criterion a file; each exports CRITERION."""
