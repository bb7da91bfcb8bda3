"""The command `hf-partial-embed`: `main` has the parser, one file each group of commands, `output` what they share."""
