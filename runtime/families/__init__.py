"""One model family a file; each exports FAMILY. `generic` serves every model without a file of its own."""
