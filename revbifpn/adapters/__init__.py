"""RevBiFPN as other frameworks expect a network to be: one module each, imported by name, never by the core."""
