"""The same server with its engines in replicas on a Ray cluster."""
