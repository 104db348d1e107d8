"""What the user asks for, read from files and the command line, and checked."""
