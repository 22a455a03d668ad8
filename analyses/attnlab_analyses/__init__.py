"""Studies of attention heads, one file each."""
