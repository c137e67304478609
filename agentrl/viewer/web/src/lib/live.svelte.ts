/** A running run's events. They may come hundreds a second: they are gathered and handed on four times a second. */
import { onDestroy } from 'svelte'
import { get, url } from './api'
import type { Entry, Flight, Line } from './types'

export interface News {
  lines: Line[]
  /** The metrics were taken back (a resume): `lines` are the first ones, not more of them. */
  reset: boolean
  entries: Entry[]
  flights: Flight[] | null
  status: string | null
  /** Episodes that ended but were too many to be sent. */
  missed: number
}

const nothing = (): News => ({ lines: [], reset: false, entries: [], flights: null, status: null, missed: 0 })

/** Metric lines after what came. */
export const after = (lines: Line[], news: News): Line[] => (news.reset ? news.lines : news.lines.length ? [...lines, ...news.lines] : lines)

/** Follow a run until the component goes. `heard` gets what came since it was last called; `why` is the server's reason
 * where it does not let us follow. */
export function follow(run: string, since: number | Promise<number>, heard: (news: News) => void): { state: () => 'open' | 'lost'; why: () => string } {
  let news = nothing()
  let fresh = false
  let state: 'open' | 'lost' = 'open'
  let why = ''
  let source: EventSource | null = null
  let later = 0
  let gone = false
  void Promise.resolve(since).then(listen)
  function listen(line: number): void {
    if (gone) return
    const opened = (source = new EventSource(url('live', { run, since: line })))
    const on = (name: string, take: (data: any) => void) =>
      opened.addEventListener(name, (event) => {
        take(JSON.parse((event as MessageEvent).data))
        fresh = true
      })
    on('metrics', (data) => {
      line = data.next
      if (data.reset) news = { ...news, reset: true, lines: [] }
      news.lines.push(...data.lines)
    })
    // Only the newest can be shown; a page that fell behind does not have to catch up.
    on('entries', (data) => {
      const all = [...news.entries, ...data.entries]
      news.missed += (data.missed ?? 0) + Math.max(0, all.length - 400)
      news.entries = all.slice(-400)
    })
    on('inflight', (data) => (news.flights = data.episodes))
    on('status', (data) => (news.status = data.status))
    opened.onopen = () => ((state = 'open'), (why = ''))
    opened.onerror = () => {
      state = 'lost'
      if (opened.readyState !== EventSource.CLOSED) return // the browser tries again by itself
      later = window.setTimeout(() => listen(line), 10_000)
      const asked = new AbortController()
      void get('live', { run, since: line }, asked.signal).catch((failed: Error) => failed.name !== 'AbortError' && (why = failed.message))
      window.setTimeout(() => asked.abort(), 3000) // let in meanwhile: it would never end
    }
  }
  const timer = window.setInterval(() => {
    if (!fresh || document.hidden) return
    const told = news
    news = nothing()
    fresh = false
    heard(told)
  }, 250)
  onDestroy(() => {
    window.clearInterval(timer)
    window.clearTimeout(later)
    gone = true
    source?.close()
  })
  return { state: () => state, why: () => why }
}
