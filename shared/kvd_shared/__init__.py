"""What the daemon, the workers and the admin command share. Imports neither torch nor triton."""
