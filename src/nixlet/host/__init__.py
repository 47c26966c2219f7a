"""The kernel and the system: processes, mounts, files, sockets."""
