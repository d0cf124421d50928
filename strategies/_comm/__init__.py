"""Communication between ranks: collectives, failures, fingerprints."""
