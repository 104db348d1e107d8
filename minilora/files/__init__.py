"""What lies on disk: base weights, adapters, snapshots."""
