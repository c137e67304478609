/** A running run's events. They may come hundreds a second: they are gathered and handed on four times a second. */
import { onDestroy } from 'svelte'
import { url } from './api'
import type { Entry, Flight, Line } from './types'

export interface News {
  lines: Line[]
  entries: Entry[]
  flights: Flight[] | null
  status: string | null
}

/** Follow a run until the component goes. `heard` gets what came since it was last called. */
export function follow(run: string, since: number, heard: (news: News) => void): { state: () => 'open' | 'lost' } {
  let news: News = { lines: [], entries: [], flights: null, status: null }
  let fresh = false
  let state: 'open' | 'lost' = 'open'
  const source = new EventSource(url('live', { run, since }))
  const on = (name: string, take: (data: any) => void) =>
    source.addEventListener(name, (event) => {
      take(JSON.parse((event as MessageEvent).data))
      fresh = true
    })
  on('metrics', (data) => news.lines.push(...data.lines))
  // Only the newest can be shown; a page that fell behind does not have to catch up.
  on('entries', (data) => (news.entries = [...news.entries, ...data.entries].slice(-400)))
  on('inflight', (data) => (news.flights = data.episodes))
  on('status', (data) => (news.status = data.status))
  source.onopen = () => (state = 'open')
  source.onerror = () => (state = 'lost')
  const timer = window.setInterval(() => {
    if (!fresh || document.hidden) return
    const told = news
    news = { lines: [], entries: [], flights: null, status: null }
    fresh = false
    heard(told)
  }, 250)
  onDestroy(() => {
    window.clearInterval(timer)
    source.close()
  })
  return { state: () => state }
}
