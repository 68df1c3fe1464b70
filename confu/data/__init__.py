"""From chat files to token documents: rows, spans, prepared folders, batches; and the target's own answers as data."""
