"""Sections of the report's page, one per file: each turns counts into figures, sentences and tables."""
