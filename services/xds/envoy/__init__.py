"""Envoy's life: what it starts with, the process, and the questions that it answers.

bootstrap.py    the configuration that it is started with; everything else comes over ADS
process.py      one process: started with few rights, found again, watched, ended
supervisor.py   keeps one running
admin.py        its admin interface, on a unix socket
log.py          what it writes, as lines of our own log
"""
