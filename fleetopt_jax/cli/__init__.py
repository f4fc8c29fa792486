"""The command line: arguments, validation at the door, progress, exit codes."""
