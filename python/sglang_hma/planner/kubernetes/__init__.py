"""Kubernetes manifests of a mix."""
