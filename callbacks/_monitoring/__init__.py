"""Mechanisms that monitors share: schedule, gradient samples, histories, figures."""
