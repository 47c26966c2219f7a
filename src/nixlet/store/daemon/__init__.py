"""The Nix daemon as a store: its worker protocol, and a client."""
