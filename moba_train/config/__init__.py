"""Configuration: TOML -> frozen dataclasses -> overrides -> validation. Imports no torch."""
