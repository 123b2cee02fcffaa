"""What comes from outside is checked here: values by type and range, settings, secrets, and the errors that say what
is wrong."""
