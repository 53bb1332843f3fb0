"""The command line: the only place that knows every package. One file a command."""
