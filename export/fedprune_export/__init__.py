"""The compiler: import, channel analysis, cutting, differentiation, bundles."""
