"""Files that are there whole or not at all: local disks and object stores, checksums, locks, mapped reading."""
