"""Checkpoints behind a URL: S3, Google Cloud, Azure, the Hugging Face hub, web servers.

A store lists names and gives ranges of one version of an object. It knows nothing of what a checkpoint is. Imports
``layout`` and what lies below; obstore, boto3 and huggingface_hub only where a URL needs them.
"""
