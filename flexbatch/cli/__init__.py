"""The command line: settings, prompt files, tables and progress."""
