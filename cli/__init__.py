"""Words in, tables out: one file a command, no logic."""
