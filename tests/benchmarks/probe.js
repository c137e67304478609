/* What a page of the viewer does, seen from inside the browser. Loaded before the page's own scripts.

Times are performance.now(), so that they count from the navigation. "On screen" is the presentation time of Element
Timing: the frame in which the text of an element was first shown, layout and raster included.
*/
(() => {
  const probe = (window.__probe = {})

  // -- when an element that came is on screen -----------------------------------------------------------
  let wanted = null
  let shown = []
  const NAME = 'probe'
  function tag(node) {
    if (!wanted || node.nodeType !== 1) return
    const found = node.matches(wanted) ? node : node.querySelector(wanted)
    if (found) found.setAttribute('elementtiming', NAME)
  }
  /** From now on, note when elements that match and are new come on screen. */
  probe.want = (selector) => {
    wanted = selector
    shown = []
  }
  /** Milliseconds since navigation at which the first was on screen; null as long as none is. */
  probe.shown = () => (shown.length ? Math.min(...shown) : null)

  // -- input ------------------------------------------------------------------------------------------
  let delays = []
  let events = []
  let last = 0
  for (const type of ['keydown', 'pointerdown', 'click', 'input', 'wheel']) {
    addEventListener(
      type,
      (event) => {
        if (!event.isTrusted) return
        if (type !== 'input') delays.push(performance.now() - event.timeStamp)
        if (type === 'keydown' || type === 'click') last = event.timeStamp
      },
      { capture: true, passive: true },
    )
  }
  /** When the last key or click was pressed, by the event's own stamp. */
  probe.pressed = () => last
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (entry.name === NAME || entry.identifier === NAME) shown.push(entry.renderTime || entry.startTime)
  }).observe({ type: 'element', buffered: true })
  const heard = (entry) => events.push({ name: entry.name, start: entry.startTime, delay: entry.processingStart - entry.startTime, duration: entry.duration })
  new PerformanceObserver((list) => list.getEntries().forEach(heard)).observe({ type: 'event', durationThreshold: 16, buffered: true })
  new PerformanceObserver((list) => list.getEntries().forEach(heard)).observe({ type: 'first-input', buffered: true })

  // -- frames, and whether the reader sees anything in them -------------------------------------------
  let gaps = []
  let frame = 0
  let scroller = null
  let holes = []
  let hole = 0
  let bare = false
  let painted = -1
  const covered = () => {
    const box = scroller.getBoundingClientRect()
    const parts = scroller.querySelectorAll('.tk-chunk')
    if (!parts.length) return 0
    const top = Math.max(box.top, parts[0].getBoundingClientRect().top)
    const end = Math.min(box.bottom, parts[parts.length - 1].getBoundingClientRect().bottom)
    return Math.max(0, end - top) / box.height
  }
  /** Watch a scroller of tokens. */
  probe.watch = (selector) => (scroller = document.querySelector(selector))
  // The compositor may have shown a new offset already, before the page drew for it: that counts from the last frame.
  addEventListener(
    'scroll',
    (event) => {
      if (event.target === scroller && scroller.scrollTop !== painted && covered() < 0.5) bare = true
    },
    { capture: true, passive: true },
  )
  // Right after a frame: what was painted in it.
  const after = new MessageChannel()
  after.port1.onmessage = ({ data: gap }) => {
    if (!scroller?.isConnected) return
    painted = scroller.scrollTop
    const empty = covered() < 0.5
    if (bare || empty) holes.push((hole += gap))
    if (!empty) hole = 0
    bare = false
  }
  const tick = (now) => {
    if (frame) {
      gaps.push(now - frame)
      if (scroller) after.port2.postMessage(now - frame)
    }
    frame = now
    if (newest) ages.push(age())
    requestAnimationFrame(tick)
  }

  // -- how old the newest row is ------------------------------------------------------------------------
  let newest = null
  let ages = []
  /** Follow the newest row: its link's title holds /t<milliseconds of the writer's clock>-. */
  probe.follow = (selector) => {
    newest = selector
    ages = []
  }
  const age = () => {
    const title = document.querySelector(newest)?.getAttribute('title') ?? ''
    const stamp = /\/t(\d+)-/.exec(title)
    return stamp ? performance.timeOrigin + performance.now() - Number(stamp[1]) : null
  }

  // -- colours ----------------------------------------------------------------------------------------
  let recoloured = []
  const channel = new MessageChannel()
  let waiting = null
  channel.port1.onmessage = () => {
    recoloured.push(performance.now() - waiting)
    waiting = null
  }
  new MutationObserver((records) => {
    for (const record of records) {
      if (record.type === 'childList') for (const node of record.addedNodes) tag(node)
      else if (waiting === null && record.target.classList.contains('tk')) {
        waiting = last
        requestAnimationFrame(() => channel.port2.postMessage(0))
      }
    }
  }).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ['class'] })

  /** All that was noted since the last call. */
  probe.take = () => {
    const got = { delays, events, gaps, holes, ages: ages.filter((each) => each !== null), recoloured }
    delays = []
    events = []
    gaps = []
    holes = []
    ages = []
    recoloured = []
    return got
  }
  requestAnimationFrame(tick)
})()
