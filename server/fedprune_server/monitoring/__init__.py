"""What a server shows of itself: figures for Prometheus, spans for OpenTelemetry, advice for people."""
