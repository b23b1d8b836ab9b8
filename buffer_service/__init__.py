"""The replay service: durable segments from many writers, sampled by the learner.

Other packages use `buffer_service.client` only.
"""
