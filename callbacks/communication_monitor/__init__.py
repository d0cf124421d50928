"""Monitor the communication between ranks."""

from lightning_sgd.callbacks.communication_monitor.communication_monitor import CommunicationMonitor

__all__ = ["CommunicationMonitor"]
