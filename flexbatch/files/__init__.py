"""Files that appear whole or not at all, and survive a loss of power. Imports nothing of the project."""
