"""The Nix daemon as a store: its worker protocol (Nix manual, "Nix daemon protocol"), and a client."""
