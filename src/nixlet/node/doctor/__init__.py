"""What ``nixlet doctor`` looks at."""
