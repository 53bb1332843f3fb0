"""Configuration: the typed schema, its rules and YAML groups, and arithmetic on them. Imports neither torch nor Ray."""
