"""The configuration: its closed schema, its targets, and how it is composed."""
