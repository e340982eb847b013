"""The services, one package each: islands that talk gRPC and never import one another."""
