"""Model classes that diffusers does not have: one file each, which exports `MODEL`. `config.json` names the class."""
