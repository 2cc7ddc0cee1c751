"""The command line: parse, load settings, call one stage, show its result. Loads no torch until a stage runs."""
