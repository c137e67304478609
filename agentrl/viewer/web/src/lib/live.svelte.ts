/** A running run's events. They may come hundreds a second: they are gathered and handed on four times a second. */
import { onDestroy } from 'svelte'
import { url } from './api'
import type { Entry, Flight, Line } from './types'

export interface News {
  lines: Line[]
  entries: Entry[]
  flights: Flight[] | null
  status: string | null
  /** Episodes that ended but were too many to be sent. */
  missed: number
}

/** Follow a run until the component goes. `heard` gets what came since it was last called. */
export function follow(run: string, since: number | Promise<number>, heard: (news: News) => void): { state: () => 'open' | 'lost' } {
  let news: News = { lines: [], entries: [], flights: null, status: null, missed: 0 }
  let fresh = false
  let state: 'open' | 'lost' = 'open'
  let source: EventSource | null = null
  let gone = false
  void Promise.resolve(since).then((line) => !gone && listen(new EventSource(url('live', { run, since: line }))))
  function listen(opened: EventSource): void {
  source = opened
  const on = (name: string, take: (data: any) => void) =>
    opened.addEventListener(name, (event) => {
      take(JSON.parse((event as MessageEvent).data))
      fresh = true
    })
  on('metrics', (data) => news.lines.push(...data.lines))
  // Only the newest can be shown; a page that fell behind does not have to catch up.
  on('entries', (data) => {
    const all = [...news.entries, ...data.entries]
    news.missed += (data.missed ?? 0) + Math.max(0, all.length - 400)
    news.entries = all.slice(-400)
  })
  on('inflight', (data) => (news.flights = data.episodes))
  on('status', (data) => (news.status = data.status))
  opened.onopen = () => (state = 'open')
  opened.onerror = () => (state = 'lost')
  }
  const timer = window.setInterval(() => {
    if (!fresh || document.hidden) return
    const told = news
    news = { lines: [], entries: [], flights: null, status: null, missed: 0 }
    fresh = false
    heard(told)
  }, 250)
  onDestroy(() => {
    window.clearInterval(timer)
    gone = true
    source?.close()
  })
  return { state: () => state }
}
