"""Bytes on disk: names, shapes, dtypes, shards. No arithmetic happens here."""
