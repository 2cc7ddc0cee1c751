"""What every stage needs of its folder: lock, key, up to date or stale, finishing; model folders; the environment."""
