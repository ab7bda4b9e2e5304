"""The Python API; `import elastic_moe` offers all of it. Nothing here needs Hydra, and Ray is imported by `train`."""
